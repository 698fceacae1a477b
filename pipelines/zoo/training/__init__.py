"""How the embedded models are trained. Nothing of this runs in a server."""
