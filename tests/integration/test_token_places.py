"""Where a token counts: addresses are written into logs and histories, headers are not."""

from tests.support.accounts import AccountService


async def test_a_token_counts_in_its_header_only(service: AccountService) -> None:
    token = (await service.log_in()).access
    good = await service.http.get("/v1/auth/me", headers={"Authorization": f"Bearer {token}"})
    assert good.status_code == 200
    for name in ("access_token", "token", "authorization"):
        assert (await service.http.get("/v1/auth/me", params={name: token})).status_code == 401
    cookie = await service.http.get("/v1/auth/me", headers={"Cookie": f"access_token={token}"})
    assert cookie.status_code == 401
