"""Many devices: the mesh, what lies where on it, and what has to travel."""
