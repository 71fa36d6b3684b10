"""Off loopback nobody sees Flower without a password; no message shows one."""

from __future__ import annotations

import pytest

from inferq.shared.errors import ConfigError
from inferq.workers.flower.access import Access, decide, is_loopback


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback_lets_everybody_in_until_a_password_is_set(address: str) -> None:
    assert is_loopback(address)
    assert decide(address, (), None) == Access(())
    assert decide(address, (), "a:b") == Access(("a:b",))


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "::", "", "10.1.2.3", "example.org", "localhost.example.org", "127.1"]
)
def test_elsewhere_a_password_is_made_that_nobody_can_guess(address: str) -> None:
    first, second = (decide(address, (), None) for _ in range(2))
    assert first.made
    assert first.basic_auth != second.basic_auth
    (credential,) = first.basic_auth
    user, _, password = credential.partition(":")
    assert (user, len(password) >= 20) == ("inferq", True)
    assert decide(address, (), "a:b") == Access(("a:b",))
    assert decide(address, (), None, other_login=True) == Access(())


def test_flowers_own_option_wins_and_several_users_are_told_apart() -> None:
    assert decide("::", ["x:y"], "a:b") == Access(("x:y",))
    assert decide("::", (), "a:b,c:d:e") == Access(("a:b", "c:d:e"))


@pytest.mark.parametrize(
    "bad",
    ["hunter2", ":hunter2", "hunter2:", "a:hunter2,", "a:hunter,2", "ä:hunter2", "a:hunter2\n"],
)
def test_what_flower_could_not_compare_is_refused_without_showing_it(bad: str) -> None:
    for given, variable in (((), bad), (bad.split(","), None)):
        with pytest.raises(ConfigError, match="expected user:password") as caught:
            decide("127.0.0.1", given, variable)
        assert "hunter" not in str(caught.value)
