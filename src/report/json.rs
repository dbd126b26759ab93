//! The report for machines. Which keys there are, and how durations are written.

use std::time::Duration;

use http::Method;
use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{
    CutConnection, CutHold, CutRequest, LeftEarly, Outcome, Remaining, Report, Requests,
    TaskReport, Trigger, UnlistedWorkers, Warning,
};
use crate::phase::Phase;

pub(crate) fn seconds<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(duration.as_secs_f64())
}

// serde passes a reference to the field.
#[expect(clippy::ref_option)]
pub(crate) fn seconds_left<S: Serializer>(
    duration: &Option<Duration>,
    to: S,
) -> Result<S::Ok, S::Error> {
    duration.map(|it| it.as_secs_f64()).serialize(to)
}

pub(super) fn method<S: Serializer>(method: &Method, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(method.as_str())
}

#[derive(Serialize)]
struct Json<'a> {
    trigger: Trigger,
    outcome: Outcome,
    exit_code: u8,
    #[serde(serialize_with = "seconds")]
    duration: Duration,
    time_in: TimeIn,
    left_early: Option<LeftEarly>,
    #[serde(serialize_with = "seconds")]
    cleanup_time: Duration,
    requests: Requests,
    remaining: Remaining,
    requests_cut: &'a [CutRequest],
    holds_cut: &'a [CutHold],
    connections_cut: &'a [CutConnection],
    tasks: &'a [TaskReport],
    unlisted_workers: UnlistedWorkers,
    server_error: Option<&'a str>,
    warnings: &'a [Warning],
}

#[derive(Serialize)]
struct TimeIn {
    #[serde(serialize_with = "seconds")]
    lame_duck: Duration,
    #[serde(serialize_with = "seconds")]
    draining: Duration,
    #[serde(serialize_with = "seconds")]
    closing: Duration,
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        Json {
            trigger: self.trigger(),
            outcome: self.outcome(),
            exit_code: self.exit_code(),
            duration: self.duration(),
            time_in: TimeIn {
                lame_duck: self.time_in(Phase::LameDuck),
                draining: self.time_in(Phase::Draining),
                closing: self.time_in(Phase::Closing),
            },
            left_early: self.left_early(),
            cleanup_time: self.cleanup_time(),
            requests: self.requests(),
            remaining: self.remaining(),
            requests_cut: self.requests_cut(),
            holds_cut: self.holds_cut(),
            connections_cut: self.connections_cut(),
            tasks: self.tasks(),
            unlisted_workers: self.unlisted_workers(),
            server_error: self.server_error(),
            warnings: self.warnings(),
        }
        .serialize(to)
    }
}

/// Its kind, its text, and what it names.
impl Serialize for Warning {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let kind = match self {
            Self::NoRequestInLayer(_) => "no_request_in_layer",
            Self::RequestOutsideLayer(_) => "request_outside_layer",
            Self::UpgradesNotHeld(_) => "upgrades_not_held",
        };
        let mut map = to.serialize_map(Some(3))?;
        map.serialize_entry("kind", kind)?;
        map.serialize_entry("message", &self.to_string())?;
        match self {
            Self::NoRequestInLayer(request) | Self::RequestOutsideLayer(request) => {
                map.serialize_entry("request", request)?;
            }
            Self::UpgradesNotHeld(connections) => {
                map.serialize_entry("connections", connections)?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::report::{GivenUp, OutsideLayer, TaskKind, TaskOutcome, UpgradedConnection};

    fn task(name: &str, kind: TaskKind, outcome: TaskOutcome) -> TaskReport {
        TaskReport {
            name: name.to_owned(),
            kind,
            began: Duration::from_millis(1500),
            took: Duration::from_millis(250),
            outcome,
        }
    }

    fn report() -> Report {
        let age = Duration::from_millis(3100);
        Report {
            trigger: Trigger::Terminate,
            outcome: Outcome::Forced,
            left_early: None,
            phases: [1000, 2000, 250].map(Duration::from_millis),
            cleanup: Duration::from_millis(62),
            requests: Requests {
                in_flight: 2,
                admitted: 1,
                finished: 1,
                refused: 1,
                cut: 2,
                dropped: 0,
            },
            remaining: Remaining {
                requests: 1,
                holds: 1,
                connections: 1,
                servers: 1,
                workers: 0,
                queued: 0,
                half_closed: 0,
            },
            given_up: Arc::new(GivenUp {
                requests: vec![CutRequest {
                    method: Method::GET,
                    path: "/never".to_owned(),
                    age,
                    streaming: false,
                }],
                unnamed: false,
                holds: vec![CutHold {
                    name: "job".to_owned(),
                    age,
                }],
                connections: vec![CutConnection {
                    peer: Some(([127, 0, 0, 1], 57036).into()),
                    age,
                    undelivered: 0,
                }],
            }),
            tasks: [
                task("mailer", TaskKind::Worker, TaskOutcome::Done),
                task(
                    "database",
                    TaskKind::Cleanup,
                    TaskOutcome::Failed("disk full".to_owned()),
                ),
            ]
            .into(),
            unlisted_workers: UnlistedWorkers::default(),
            server_error: None,
            warnings: [Warning::RequestOutsideLayer(OutsideLayer {
                method: Method::GET,
                path: "/status".to_owned(),
                peer: None,
            })]
            .into(),
        }
    }

    fn json(value: &impl Serialize) -> serde_json::Value {
        serde_json::to_value(value).unwrap()
    }

    #[test]
    fn the_json_of_a_report_is_the_documented_one() {
        let mut documented: serde_json::Value =
            serde_json::from_str(include_str!("report.json")).unwrap();
        let report = report();
        // In the documentation it is cut short.
        documented["warnings"][0]["message"] = report.warnings[0].to_string().into();
        assert_eq!(json(&report), documented);
    }

    #[test]
    fn every_other_variant_has_its_name_in_snake_case() {
        let triggers = [
            Trigger::Terminate,
            Trigger::Interrupt,
            Trigger::Shutdown,
            Trigger::Future,
            Trigger::ServerEnded,
            Trigger::WorkerEnded,
            Trigger::PreStop,
        ];
        let names = "[\"terminate\",\"interrupt\",\"shutdown\",\"future\",\"server_ended\",\"worker_ended\",\"pre_stop\"]";
        assert_eq!(serde_json::to_string(&triggers).unwrap(), names);
        let outcomes = [
            Outcome::Clean,
            Outcome::Forced,
            Outcome::CleanupFailed,
            Outcome::Abandoned,
            Outcome::ServerFailed,
        ];
        let names = "[\"clean\",\"forced\",\"cleanup_failed\",\"abandoned\",\"server_failed\"]";
        assert_eq!(serde_json::to_string(&outcomes).unwrap(), names);
        let early = [LeftEarly::Quiet, LeftEarly::Noticed];
        let names = "[\"quiet\",\"noticed\"]";
        assert_eq!(serde_json::to_string(&early).unwrap(), names);
        let task = task(
            "hook",
            TaskKind::LameDuck,
            TaskOutcome::Panicked("no".to_owned()),
        );
        let expected = serde_json::json!({
            "name": "hook", "kind": "lame_duck", "began": 1.5, "took": 0.25,
            "outcome": "panicked", "error": "no",
        });
        assert_eq!(json(&task), expected);
        for (outcome, name) in [
            (TaskOutcome::EndedEarly, "ended_early"),
            (TaskOutcome::Cut, "cut"),
            (TaskOutcome::NotRun, "not_run"),
        ] {
            assert_eq!(json(&outcome), serde_json::json!({ "outcome": name }));
        }
    }

    #[test]
    fn a_warning_names_the_connections_it_is_about() {
        let warning = Warning::UpgradesNotHeld(vec![UpgradedConnection {
            path: Some("/socket".to_owned()),
            peer: None,
            age: Duration::from_millis(500),
        }]);
        let expected = serde_json::json!({
            "kind": "upgrades_not_held",
            "message": warning.to_string(),
            "connections": [{ "path": "/socket", "peer": null, "age": 0.5 }],
        });
        assert_eq!(json(&warning), expected);
    }

    #[test]
    fn a_snapshot_has_its_time_left_in_seconds_or_null() {
        let mut snapshot = crate::Graceful::new().snapshot();
        let expected = serde_json::json!({
            "phase": "serving", "ready": true, "in_flight": 0, "connections": 0,
            "time_left": null, "refused_draining": 0, "refused_full": 0,
        });
        assert_eq!(json(&snapshot), expected);
        snapshot.phase = Phase::LameDuck;
        snapshot.time_left = Some(Duration::from_millis(2500));
        let later = json(&snapshot);
        assert_eq!(later["phase"], "lame_duck");
        assert_eq!(later["time_left"], 2.5);
    }
}
