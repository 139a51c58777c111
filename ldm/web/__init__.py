"""The web page: `service` checks requests and carries them out, `page` shows them in a browser with Gradio."""
