"""Running on many devices and processes: the mesh, sharding rules, and how processes meet."""
