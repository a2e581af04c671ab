"""One model over several hosts: the leader decides, and the followers execute its messages.

    leader      HTTP, tokenizer, grammar, scheduler ──► LeadingRunner ──► devices of this host
                                                            │ messages (XPUB/SUB)   ▲
                                                            ▼                       │ collectives
    follower                                           follow() ──────────► devices of that host

Nothing enters a device program except through a message, so that clocks, pacing and the order of
arrivals cannot make the hosts differ. If a host fails or falls silent, the whole group ends.
"""
