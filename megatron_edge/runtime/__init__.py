"""What a job runs on: the launcher, the topology, process groups and devices, and every patch of upstream."""
