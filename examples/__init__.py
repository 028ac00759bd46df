"""Example programs; the packages do not import them."""
