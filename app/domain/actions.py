"""The names of all actions that an event of the audit log may have. A filter by another name is a slip, and is refused."""

from typing import Final

ACTIONS: Final = frozenset({
    "audit.export", "audit.read", "audit.rotate_key",
    "auth.alarm", "auth.login", "auth.me", "auth.password", "auth.refresh", "auth.revoke", "auth.strangers", "auth.totp.begin",
    "auth.totp.confirm", "auth.totp.remove",
    "backup.make", "backup.restore",
    "case.list", "case.read",
    "client.create", "client.delete", "client.list", "client.read", "client.rotate", "client.update",
    "dedup.decide", "dedup.read", "dedup.scan", "dedup.verdict",
    "face.alarm", "face.challenge", "face.compare", "face.detect", "face.identify", "face.quality", "face.verify",
    "gallery.create", "gallery.delete", "gallery.pending.agree", "gallery.pending.cancel", "gallery.pending.lapse",
    "gallery.re_embed", "gallery.read", "gallery.update",
    "identity.attempts.reset", "identity.bulk_read", "identity.enrol", "identity.erase", "identity.erase.alarm",
    "identity.export", "identity.import", "identity.list", "identity.photo.view", "identity.read", "identity.reinstate",
    "identity.revoke", "identity.screen", "identity.update",
    "index.publish", "index.withdraw",
    "keys.rewrap", "keys.rotate",
    "proposal.agree", "proposal.create", "proposal.list", "proposal.read", "proposal.withdraw",
    "sample.add", "sample.remove",
    "scan.read",
    "stores.adopt",
    "system.read",
    "user.create", "user.delete", "user.list", "user.read", "user.unlock", "user.update",
})  # fmt: skip
