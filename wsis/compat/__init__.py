"""Other projects' names for the operators of wsis; each module here is imported on its own."""
