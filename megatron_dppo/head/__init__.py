"""The policy head: token statistics and the policy gradient from hidden states and a vocabulary shard."""
