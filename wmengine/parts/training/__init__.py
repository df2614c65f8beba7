"""How marks get into a network: terms of the loss, and rows of a batch. These files need torch once a course begins."""
