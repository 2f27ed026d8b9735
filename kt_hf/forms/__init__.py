"""How a model holds its experts: stacked in one module, or each by itself in a list, under a block that calls them."""
