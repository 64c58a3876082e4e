"""Callers: what they log in with, the tokens that they carry, and who stands behind a token at this moment.

tokens.py         what a token says: pure reading of hostile text
signing.py        the keys that sign tokens and assertions, and their succession
callers.py        Access: issues tokens, and looks up whose they are now
grants.py         what an account may be given: roles, and galleries by name
passwords.py      Argon2id in a bounded pool
second_factor.py  one-time codes
backoff.py        failed logins cost time
"""
