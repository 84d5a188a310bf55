"""Official archives, as downloaded, to the folders that `wsis.data` opens."""
