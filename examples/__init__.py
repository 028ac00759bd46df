"""Programs that show the packages at work; none of the packages imports them."""
