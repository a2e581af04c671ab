"""The sockets between hosts: who may connect, and what is lost."""

import pytest

from fairkv_jax.hosts.messages import Failed, Heartbeat, Stopped
from fairkv_jax.hosts.transport import FollowerSockets, Keys, LeaderSockets, _check_number


def test_a_follower_hears_the_leader_and_a_stranger_nothing():
    leader_keys, follower_keys = Keys(), Keys()
    leader = LeaderSockets("127.0.0.1", leader_keys, {follower_keys.public: 1})
    stranger = FollowerSockets(leader.endpoints, Keys(), leader_keys.public)
    assert not leader.wait_for_followers(0.5)
    follower = FollowerSockets(leader.endpoints, follower_keys, leader_keys.public)
    assert leader.wait_for_followers(30)
    stranger.send(Failed("a lie"))
    follower.send(Stopped())
    assert next(leader.receive(30)) == (1, Stopped())
    leader.send(Heartbeat())
    assert next(follower.receive(30)) == Heartbeat()
    assert not list(stranger.receive(0.5))
    assert not list(leader.receive(0.5))
    for each in (stranger, follower, leader):
        each.close()


def test_a_false_leader_is_not_heard():
    keys = Keys()
    false_leader = LeaderSockets("127.0.0.1", Keys(), {keys.public: 1})
    follower = FollowerSockets(false_leader.endpoints, keys, Keys().public)
    assert not false_leader.wait_for_followers(0.5)
    false_leader.send(Heartbeat())
    assert not list(follower.receive(0.5))
    follower.close()
    false_leader.close()


def test_an_address_of_another_machine():
    with pytest.raises(ValueError, match=r"host 0 cannot listen on .* address 192\.0\.2\.1"):
        LeaderSockets("192.0.2.1", Keys(), {})


def test_a_gap_is_noticed():
    with pytest.raises(ValueError, match="message 3 of the leader was lost, message 5 came"):
        _check_number(5, 3, "the leader")
