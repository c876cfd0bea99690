"""What the daemon and the launcher need of systemd: socket activation, notify, journal."""
