"""For you, and you may also like: several simple recommenders joined in one."""
