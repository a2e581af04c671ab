"""From a plan to arrays on devices: the mesh, the slot layout, the placed weights."""
