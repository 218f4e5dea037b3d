from benchmarks.reuse_influence import skipping_plans


def test_plans_skip_the_longest_runs_everywhere_and_every_other_step_of_each_half():
    plans = skipping_plans(20, 3)
    assert plans["steps 2 to 4"].to_string() == "FFKKK" + 15 * "F"
    assert plans["steps 16 to 18"].to_string() == 16 * "F" + "KKKF"
    assert plans["every other step, 2 to 10"].to_string() == "FF" + 5 * "KF" + 8 * "F"
    assert plans["every other step, 12 to 18"].to_string() == 12 * "F" + 4 * "KF"
    assert len(plans) == 10
    assert all(plan.to_string()[-1] == "F" for plan in plans.values())
