"""Plans of a training run on devices that are not here: whether it compiles and fits, and what bounds its time."""
