"""PPO on a language model: the trainer that a script drives, and the update it makes."""
