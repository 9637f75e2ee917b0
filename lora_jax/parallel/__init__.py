"""One program on many devices and processes: the mesh, who holds which part of what, and how processes meet."""
