"""How fast a study's parts are on this machine, measured on random images of its shape before anything is made."""
