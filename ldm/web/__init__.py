"""The web page: `edits` checks a request and carries it out, `page` shows it in a browser with Gradio."""
