"""What measures for a table or a plot, and the baselines that the tables compare with."""
