"""Train the model: modules, callbacks, sharding, runs."""
