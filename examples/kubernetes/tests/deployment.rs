//! `deployment.yaml` and `Dockerfile` agree with the service's plan.

use std::time::Duration;

#[path = "../plan.rs"]
mod plan;

const DEPLOYMENT: &str = include_str!("../deployment.yaml");
const DOCKERFILE: &str = include_str!("../Dockerfile");

/// The first number with the key `key` after the text `section`.
fn number(section: &str, key: &str) -> u64 {
    let after = DEPLOYMENT
        .split_once(section)
        .unwrap_or_else(|| panic!("no {section}"))
        .1;
    let value = after
        .split_once(&format!("{key}: "))
        .unwrap_or_else(|| panic!("no {key}"))
        .1;
    let value = value.split_whitespace().next().unwrap();
    value
        .parse()
        .unwrap_or_else(|_| panic!("{section} {key}: {value}"))
}

fn seconds(section: &str, key: &str) -> Duration {
    Duration::from_secs(number(section, key))
}

fn failures(probe: &str) -> u32 {
    u32::try_from(number(probe, "failureThreshold")).unwrap()
}

/// The longest time from the first moment without an answer until the failure takes effect, without the
/// timeout of the last probe: the first probe may come a period later.
fn fails_at_the_latest(probe: &str) -> Duration {
    seconds(probe, "periodSeconds") * failures(probe)
}

/// The shortest such time: the first probe comes at once.
fn fails_at_the_earliest(probe: &str) -> Duration {
    seconds(probe, "periodSeconds") * (failures(probe) - 1)
}

#[test]
fn the_grace_period_is_the_pods() {
    let plan = plan::graceful().unwrap().plan();
    assert_eq!(
        plan.grace_period,
        seconds("kind: Deployment", "terminationGracePeriodSeconds")
    );
    // A preStop hook would use up a part of the pod's grace period.
    assert!(!DEPLOYMENT.contains("preStop:"));
}

#[test]
fn the_delay_covers_a_balancer_that_asks_for_readiness() {
    let plan = plan::graceful().unwrap().plan();
    let answer = seconds("readinessProbe", "timeoutSeconds");
    assert!(plan.drain_delay > fails_at_the_latest("readinessProbe") + answer);
}

#[test]
fn a_new_pod_counts_only_when_every_node_routes_to_it() {
    let plan = plan::graceful().unwrap().plan();
    // Adding an address takes as long as removing it.
    assert!(seconds("kind: Deployment", "minReadySeconds") >= plan.drain_delay);
    assert_eq!(number("rollingUpdate:", "maxUnavailable"), 0);
    assert!(number("rollingUpdate:", "maxSurge") >= 1);
    let started =
        fails_at_the_latest("startupProbe") + seconds("kind: Deployment", "minReadySeconds");
    assert!(seconds("kind: Deployment", "progressDeadlineSeconds") > started);
}

#[test]
fn a_disruption_leaves_pods_that_serve() {
    let replicas = number("kind: Deployment", "replicas");
    assert!(number("kind: PodDisruptionBudget", "maxUnavailable") < replicas);
}

#[test]
fn liveness_outlasts_a_stop() {
    // The kubelet ends liveness probes at the deletion of a pod. In a stop that it does not know of, the
    // liveness probe would not kill the process before its grace period is over, even if the process did
    // not answer at all from the signal on.
    let plan = plan::graceful().unwrap().plan();
    assert!(fails_at_the_earliest("livenessProbe") >= plan.grace_period);
}

#[test]
fn the_bodies_of_all_requests_fit_into_half_of_the_memory() {
    let (_, memory) = DEPLOYMENT.split_once("limits: { memory: ").unwrap();
    let memory: usize = memory.split_once("Mi").unwrap().0.parse().unwrap();
    assert!(plan::IN_FLIGHT * plan::BODY <= memory * 1024 * 1024 / 2);
}

#[test]
fn the_port_is_the_same_everywhere() {
    assert_eq!(number("ports:", "containerPort"), u64::from(plan::PORT));
    assert!(DOCKERFILE.contains(&format!("EXPOSE {}", plan::PORT)));
}

#[test]
fn the_service_is_the_first_process_and_not_root() {
    let entry = DOCKERFILE
        .lines()
        .find(|line| line.starts_with("ENTRYPOINT"))
        .unwrap();
    assert!(
        entry.starts_with("ENTRYPOINT [\""),
        "not the exec form: {entry}"
    );
    assert!(!DOCKERFILE.lines().any(|line| line.starts_with("CMD")));
    let user = number("securityContext", "runAsUser");
    assert_ne!(user, 0);
    assert!(DOCKERFILE.contains(&format!("USER {user}:")));
}
