//! The ratings service and its MySQL server, end to end.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use egress_tests::{
    mariadb::Answer,
    scenario::{SERVER, Scenario},
};

#[test]
fn a_policy_file_opens_the_database_and_its_removal_closes_it_without_a_restart() {
    let mut scenario = Scenario::start().unwrap();

    let (said, denial) = scenario.ask_in_vain().unwrap();
    assert!(said.contains("Operation not permitted") || said.contains("(1)"), "{said}");
    assert_eq!(denial["type"], "connection");
    assert_eq!((&denial["verdict"], &denial["reason"]), (&"deny".into(), &"no_rule".into()));
    assert_eq!(denial["rule"], serde_json::Value::Null);
    assert_eq!((&denial["destination"]["address"], &denial["destination"]["port"]), (&SERVER.into(), &3306.into()));
    assert_eq!((&denial["protocol"], &denial["hook"]), (&"TCP".into(), &"connect4".into()));
    assert_eq!(denial["process"]["comm"], "mariadb");
    assert_eq!(denial["process"]["uid"], 0);
    assert_eq!(denial["cgroup"]["path"], scenario.cgroup.name());

    scenario.add_policy(2).unwrap();
    let Answer::Ratings(ratings) = scenario.ask().unwrap() else { panic!("the policy did not open the database") };
    assert_eq!(ratings, "5\n4");

    scenario.remove_policy(3).unwrap();
    scenario.ask_in_vain().unwrap();

    let (status, denials, log) = scenario.agent.stop().unwrap();
    assert_eq!((status.code(), denials.len()), (Some(0), 0), "{log:#?}");
    assert!(!log.iter().any(|line| line.contains(" WARN ") || line.contains(" ERROR ")), "{log:#?}");
}
