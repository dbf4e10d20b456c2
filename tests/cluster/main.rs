//! The cluster rung: one local cluster of three nodes, started with the real programs, images and kubectl; tests run in it, most of
//! them one after the other, and clean up behind themselves. The cluster goes when they are through, whatever happened.

mod canary;
mod check;
mod cluster;
mod deploy;
mod failures;
mod families;
mod features;
mod firewalls;
mod flows;
mod gateway;
mod hazards;
mod limits;
mod load;
mod losses;
mod machine;
mod mesh;
mod network;
mod policies;
mod protocols;

use anyhow::Context;
use cluster::Cluster;
use libtest_mimic::{Arguments, Trial};
use std::sync::Arc;

type Test = fn(&Cluster) -> anyhow::Result<()>;

/// Two at a time, before the others: each in namespaces of its own, with few requests a second, and waiting for most of its time.
const BESIDE: &[(&str, Test)] = &[
    ("policies_hold_with_and_without_sidecars", policies::policies_hold_with_and_without_sidecars),
    ("limits_hold_with_and_without_sidecars", limits::limits_hold_with_and_without_sidecars),
    ("rules_hold_with_and_without_sidecars", features::rules_hold_with_and_without_sidecars),
    ("protocols_pass_with_and_without_sidecars", protocols::protocols_pass_with_and_without_sidecars),
    ("certificates_renew_and_end", hazards::certificates_renew_and_end),
    ("broken_backends_are_told_and_left", hazards::broken_backends_are_told_and_left),
    ("routes_do_what_they_ask", mesh::routes_do_what_they_ask),
    ("requests_leave_spans_and_lines", policies::requests_leave_spans_and_lines),
    ("access_is_by_identity", mesh::access_is_by_identity),
    ("strict_pods_refuse_plain_callers", canary::strict_pods_refuse_plain_callers),
];

/// One after the other: they share two CPUs, and some of them break the cluster.
const TESTS: &[(&str, Test)] = &[
    ("deploy_a_container", deploy::deploy_a_container),
    ("pods_spread_and_the_thirteenth_waits", deploy::pods_spread_and_the_thirteenth_waits),
    ("containers_come_back", deploy::containers_come_back),
    ("probes_cull_and_restart", deploy::probes_cull_and_restart),
    ("init_containers_volumes_and_logs", deploy::init_containers_volumes_and_logs),
    ("services_have_names_and_stable_addresses", network::services_have_names_and_stable_addresses),
    ("services_keep_clients_and_stay_near", network::services_keep_clients_and_stay_near),
    ("readiness_withdraws_on_all_nodes", network::readiness_withdraws_on_all_nodes),
    ("containers_of_a_pod_share_localhost", network::containers_of_a_pod_share_localhost),
    ("external_names_lead_elsewhere", network::external_names_lead_elsewhere),
    ("check_walks_the_paths", check::check_walks_the_paths),
    ("flows_show_who_calls_whom", flows::flows_show_who_calls_whom),
    ("install_waits_for_the_plugin", check::install_waits_for_the_plugin),
    ("kernel_state_is_put_right", network::kernel_state_is_put_right),
    ("services_of_both_families", families::services_of_both_families),
    ("meshed_pods_speak_ipv6", families::meshed_pods_speak_ipv6),
    ("ipv6_alone", families::ipv6_alone),
    ("rolling_update_loses_nothing", canary::rolling_update_loses_nothing),
    ("canary_split_is_exact", canary::canary_split_is_exact),
    ("canary_shifts_under_load", canary::canary_shifts_under_load),
    ("sidecars_killed_under_load", failures::sidecars_killed_under_load),
    ("a_backend_is_cut_off_under_load", policies::a_backend_is_cut_off_under_load),
    ("gateway_serves_clients_outside", gateway::gateway_serves_clients_outside),
    ("agent_and_control_killed_under_load", failures::agent_and_control_killed_under_load),
    ("a_lost_node_loses_its_pods", failures::a_lost_node_loses_its_pods),
    ("backends_go_under_load", losses::backends_go_under_load),
    ("a_lost_node_is_not_dialled", losses::a_lost_node_is_not_dialled),
    ("another_node_announces", losses::another_node_announces),
    ("rule_sets_of_hosts_are_no_obstacle", firewalls::rule_sets_of_hosts_are_no_obstacle),
    ("firewalls_are_left_alone", firewalls::firewalls_are_left_alone),
    ("down_leaves_nothing", failures::down_leaves_nothing),
];

fn main() {
    let mut arguments = Arguments::from_args();
    let all = || BESIDE.iter().chain(TESTS);
    if arguments.list {
        let trials = all().map(|(name, _)| Trial::test(*name, || Ok(()))).collect();
        libtest_mimic::run(&arguments, trials).exit();
    }
    let wanted = |name: &str| arguments.filter.as_ref().is_none_or(|f| name.contains(f.as_str()));
    if !all().any(|(name, _)| wanted(name)) {
        libtest_mimic::run(&arguments, vec![]).exit();
    }
    let cluster = match Cluster::start() {
        Ok(c) => Arc::new(c),
        Err(e) => {
            eprintln!("the cluster did not start: {e:#}");
            std::process::exit(101);
        }
    };
    let mut run = |tests: &'static [(&str, Test)], at_a_time| {
        let trials = tests.iter().map(|(name, test)| {
            let cluster = cluster.clone();
            Trial::test(*name, move || cluster.run(name, *test).map_err(|e| format!("{e:#}").into()))
        });
        arguments.test_threads = Some(at_a_time);
        libtest_mimic::run(&arguments, trials.collect())
    };
    let conclusions = [run(BESIDE, 2), run(TESTS, 1)];
    let left = cluster.stop().context("take the cluster down");
    let ended = left.and(cluster.note_failures());
    if let Err(e) = &ended {
        eprintln!("{e:#}");
    }
    let failed = ended.is_err() || conclusions.iter().any(libtest_mimic::Conclusion::has_failed);
    std::process::exit(if failed { 101 } else { 0 })
}
