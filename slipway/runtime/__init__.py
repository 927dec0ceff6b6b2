"""Models on devices: files opened, declarations fitted to a mesh, arrays loaded. Not here: requests (engine/)."""
