"""Memory of the host that a device's data is read into."""
