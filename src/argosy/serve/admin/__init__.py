"""The routes and loops through which operators watch and change a server."""
