"""The models of a server, and each as it is open."""
