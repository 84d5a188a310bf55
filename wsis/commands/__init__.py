"""The commands of `wsis`: one file each, one function that takes its arguments."""
