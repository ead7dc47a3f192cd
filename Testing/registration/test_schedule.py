"""Levels, steps and smoothing by preset and by what is registered."""

from SymRegistrationLib.registration.presets import presets
from SymRegistrationLib.registration.schedule import Schedule, schedule_for


def test_what_is_registered_decides_how_much_is_smoothed():
    for preset in presets().values():
        detailed, one_patient = (
            Schedule.of(preset),
            schedule_for(preset, "mind", one_patient=True, slides=False),
        )
        assert one_patient == detailed.for_one_patient() != detailed
        assert schedule_for(preset, "mind", one_patient=False, slides=False) == detailed
        assert schedule_for(preset, "lncc", one_patient=True, slides=False) == detailed
        sliding = schedule_for(preset, "lncc", one_patient=True, slides=True)
        assert sliding == detailed.for_sliding() and sliding.smooth_total == 1.4


def test_where_landmarks_or_labels_pull_between_two_contrasts_less_is_smoothed():
    for preset in presets().values():
        usual = schedule_for(preset, "mind", one_patient=True, slides=False)
        pulled = schedule_for(preset, "mind", one_patient=True, slides=False, pulled=True)
        assert 1 < usual.smooth_update / pulled.smooth_update < 4 < usual.smooth_total / pulled.smooth_total < 5
        for kind in (("lncc", True, False), ("mind", False, False), ("mind", True, True)):
            assert schedule_for(preset, *kind, pulled=True) == schedule_for(preset, *kind)


def test_after_a_network_the_finest_levels_are_left_with_fewer_steps():
    plan = presets()["thorough"]
    whole, after = Schedule.of(plan), Schedule.of(plan, 2)
    assert after.shrink == whole.shrink[-2:] == (1.67, 1) and after.tolerance == whole.tolerance
    assert all(n < m for n, m in zip(after.iterations, whole.iterations[-2:]))
    assert Schedule.of(plan, 9).shrink == whole.shrink
