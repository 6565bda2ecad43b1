"""Key formats: how adapters are spelled. One file each, attribute `FORMAT`."""
