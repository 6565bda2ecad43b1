"""Key formats: the spelling of adapter keys. One file per format, attribute `FORMAT`."""
