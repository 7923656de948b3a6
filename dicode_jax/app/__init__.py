"""The web app: a page on which to type a prompt and watch its clips. Only `page` needs Gradio."""
