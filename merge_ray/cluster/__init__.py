"""Everything that is Ray: the hosts that merge and score, the trials that use them, and the ledger's writer."""
