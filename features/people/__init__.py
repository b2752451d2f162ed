"""Who is who and what they allow: identity, consent, contacts, the vault, tombstones."""
