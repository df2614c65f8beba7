"""Many suspects × many watermarks, in sandboxes, on all cores or a cluster, resumed where it stopped."""
