"""Player: registered models behind HTTP, for people (a page on which a scene is steered) and for programs (an API).

Ray Serve runs it; this folder alone speaks to Serve and FastAPI.
"""
