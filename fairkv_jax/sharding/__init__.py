"""From a plan to arrays on devices: the mesh, the layout of head slots, loading weights."""
