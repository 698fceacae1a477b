from deployments.cli import app

app()
