"""The networks: denoising UNet, first stage, exemplar encoder."""
