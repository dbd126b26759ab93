//! A model of the kubelet and of the endpoint controller, for one pod.
//!
//! The rules are those of the pages
//! [Pod Lifecycle](https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/),
//! [Container Lifecycle Hooks](https://kubernetes.io/docs/concepts/containers/container-lifecycle-hooks/) and
//! [Probes](https://kubernetes.io/docs/tasks/configure-pod-container/configure-liveness-readiness-startup-probes/):
//!
//! 1. A container begins not ready. The startup probe comes first, the other two begin when it has
//!    succeeded. Each probe takes effect after its threshold of equal results in a row. A status from 200
//!    to 399 is a success; no answer within the timeout is a failure.
//! 2. If the startup or the liveness probe fails, the container is stopped and started again.
//! 3. A pod that is not ready leaves the endpoints, and returns when it is ready.
//! 4. The deletion starts two things at the same time. The pod leaves the endpoints, ready or not. The
//!    kubelet runs the preStop hook, and sends SIGTERM when the hook has ended, with any result. A GET
//!    that is refused ends the hook at once.
//! 5. The grace period begins before the hook. A hook that outlasts it is abandoned, and the container
//!    gets two more seconds. SIGKILL follows.
//!
//! A stop that does not begin with a deletion is probed to its end.
//!
//! The model differs from the kubelet in these points:
//!
//! - The kubelet ends the liveness probe at the deletion. The model continues it, without an effect, to count
//!   the answers.
//! - The kubelet follows redirects of a probe on the same host. For the model any 3xx is a success.
//! - The model starts a container again at once (no `CrashLoopBackOff`), and has neither
//!   `initialDelaySeconds` nor a grace period of a probe's own (`terminationGracePeriodSeconds` of a probe).
//! - The timeout of each probe is 3 s. `examples/kubernetes/deployment.yaml` has 1 s, 1 s and 5 s.
//! - Nodes use terminating pods that are still ready if all pods are terminating (`externalTrafficPolicy:
//!   Local`, one replica). The model never does.

use std::{
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{sleep, sleep_until},
};

use crate::{
    balancer::Balancer,
    instance::{Ended, Instance, Problem},
    probes::{InARow, Lively, Probe},
    single,
};

/// How often a container is started again before the pod is given up.
const MOST_RESTARTS: u32 = 3;

#[derive(Clone, Debug)]
pub(crate) enum Hook {
    None,
    Sleep(Duration),
    HttpGet(Get),
}

/// The `httpGet` of a preStop hook.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Get {
    pub(crate) path: &'static str,
    /// Another port than the one of the service.
    pub(crate) port: Option<u16>,
    /// Whether a proxy in the pod forwards the call. It adds `X-Forwarded-For`.
    pub(crate) is_forwarded: bool,
}

impl Hook {
    pub(crate) fn get(path: &'static str) -> Self {
        Self::HttpGet(Get {
            path,
            port: None,
            is_forwarded: false,
        })
    }
}

/// The parts of a pod's manifest that matter here.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) command: Vec<String>,
    pub(crate) startup: Probe,
    pub(crate) readiness: Probe,
    pub(crate) liveness: Probe,
    pub(crate) pre_stop: Hook,
    pub(crate) grace_period: Duration,
    /// The time that a container has after a hook that outlasted the grace period.
    pub(crate) extension: Duration,
    /// The timeout of a wait for a status of the pod.
    pub(crate) bound: Duration,
}

/// What can be seen of a pod from outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) ready: bool,
    /// Whether it ever was ready, also before a restart.
    pub(crate) was_ready: bool,
    pub(crate) deleted: bool,
    pub(crate) restarts: u32,
}

/// The end of a pod.
#[derive(Debug)]
pub(crate) struct Death {
    pub(crate) deleted: Instant,
    /// When SIGTERM was sent.
    pub(crate) terminated: Instant,
    /// Whether the preStop hook succeeded. `None` without one.
    pub(crate) hook: Option<bool>,
    pub(crate) ended: Ended,
    pub(crate) lively: Lively,
    pub(crate) restarts: u32,
}

impl Death {
    /// How long the container had not answered the liveness probe when it ended.
    pub(crate) fn silence(&self) -> Duration {
        self.lively.silence(self.ended.exited)
    }

    /// Whether the `httpGet` hook started the stop, and was answered when the delay was over.
    pub(crate) fn was_called(&self, delay: Duration) -> bool {
        self.hook == Some(true)
            && self.terminated - self.deleted >= delay
            && self.ended.output.contains("shutdown by preStop")
    }

    /// Whether the container answered the liveness probe after the signal, and until it ended.
    pub(crate) fn was_lively(&self, probe: &Probe) -> bool {
        let lively = &self.lively;
        lively.phases.contains("lame duck") && lively.gaps == 0 && self.silence() <= probe.silence()
    }
}

/// A running pod. Dropping it kills its container.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) port: u16,
    bound: Duration,
    status: watch::Receiver<Status>,
    delete: Option<oneshot::Sender<()>>,
    kubelet: JoinHandle<Result<Death, Problem>>,
    /// Ends of containers before the deletion.
    pub(crate) events: Arc<Mutex<Vec<Event>>>,
}

/// The end of a container that was started again.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) text: String,
    /// How long the container had not answered the liveness probe when it ended.
    pub(crate) silence: Duration,
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.kubelet.abort();
    }
}

impl Pod {
    pub(crate) fn start(spec: Spec, port: u16) -> Self {
        let (send_status, status) = watch::channel(Status::default());
        let (delete, deleted) = oneshot::channel();
        let events = Arc::default();
        let bound = spec.bound;
        let kubelet = Kubelet {
            spec,
            port,
            status: send_status,
            events: Arc::clone(&events),
        };
        Self {
            port,
            bound,
            status,
            delete: Some(delete),
            kubelet: tokio::spawn(kubelet.run(deleted)),
            events,
        }
    }

    pub(crate) fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// Waits for a status, within the bound of the pod.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        is: impl FnMut(&Status) -> bool,
    ) -> Result<(), Problem> {
        let bound = self.bound;
        let waited = tokio::time::timeout(bound, self.status.wait_for(is)).await;
        match waited.map(|status| status.map(drop)) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(match (&mut self.kubelet).await {
                Ok(Err(problem)) => problem,
                _ => Problem(format!("the pod on port {} has ended", self.port)),
            }),
            Err(_) => Err(Problem(format!(
                "the pod on port {} is not {what} within {bound:?}: {:?}",
                self.port,
                self.status()
            ))),
        }
    }

    pub(crate) async fn ready(&mut self) -> Result<(), Problem> {
        self.until("ready", |status| status.ready).await
    }

    /// Keeps the pod's address in the balancer while the pod is ready. Every change arrives there late.
    pub(crate) fn expose(&self, balancer: Arc<Balancer>, late: Duration) {
        let (port, mut status) = (self.port, self.status.clone());
        let (changes, mut due) = mpsc::unbounded_channel::<(tokio::time::Instant, bool)>();
        tokio::spawn(async move {
            let mut listed = false;
            loop {
                let serves = {
                    let status = status.borrow_and_update();
                    status.ready && !status.deleted
                };
                if serves != listed {
                    listed = serves;
                    let _ = changes.send((tokio::time::Instant::now() + late, serves));
                }
                if status.changed().await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            while let Some((at, serves)) = due.recv().await {
                sleep_until(at).await;
                if serves {
                    balancer.add(port);
                } else {
                    balancer.remove(port);
                }
            }
        });
    }

    /// Deletes the pod, and waits for its end.
    pub(crate) async fn delete(mut self) -> Result<Death, Problem> {
        if let Some(delete) = self.delete.take() {
            let _ = delete.send(());
        }
        let ended = (&mut self.kubelet).await;
        ended.unwrap_or_else(|error| Err(Problem(format!("the kubelet has ended: {error}"))))
    }
}

#[derive(Debug)]
struct Kubelet {
    spec: Spec,
    port: u16,
    status: watch::Sender<Status>,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Kubelet {
    async fn run(self, mut deletion: oneshot::Receiver<()>) -> Result<Death, Problem> {
        loop {
            let mut container = Instance::start(&self.spec.command, self.port)?;
            let lively = Mutex::new(Lively::default());
            let mut watch = pin!(self.watch(&lively));
            let seen =
                || std::mem::take(&mut *lively.lock().unwrap_or_else(PoisonError::into_inner));
            let watched = tokio::select! {
                biased;
                _ = &mut deletion => {
                    let restarts = self.status.borrow().restarts;
                    self.status.send_modify(|status| status.deleted = true);
                    let deleted = Instant::now();
                    // A probe that is in flight is not given up. No probe has an effect on the stop.
                    let probes = async {
                        watch.await;
                        self.watch_to_the_end(&lively).await
                    };
                    let (terminated, hook, ended) = tokio::select! {
                        stopped = self.stop(&mut container, deleted) => stopped?,
                        never = probes => match never {},
                    };
                    return Ok(Death {
                        deleted,
                        terminated,
                        hook,
                        ended,
                        lively: seen(),
                        restarts,
                    });
                }
                status = container.wait() => {
                    let (status, lively) = (status?, seen());
                    let silence = lively.silence(Instant::now());
                    Event { text: format!("ended by itself, {status}; {lively}"), silence }
                }
                failed = &mut watch => {
                    let (_, _, ended) = tokio::select! {
                        stopped = self.stop(&mut container, Instant::now()) => stopped?,
                        // Until the container is started again, only the other probes rest.
                        never = self.watch_readiness(), if failed == "liveness" => match never {},
                    };
                    let by = if ended.killed { "SIGKILL" } else { "SIGTERM" };
                    let lively = seen();
                    let silence = lively.silence(ended.exited);
                    let text = format!(
                        "stopped because its {failed} probe failed, ended after {by}, {}; {lively}; no \
                         answer in the last {:.2} s",
                        ended.status,
                        silence.as_secs_f64(),
                    );
                    Event { text, silence }
                }
            };
            let restarts = self.status.borrow().restarts + 1;
            if restarts > MOST_RESTARTS {
                container.must_run("again and again").await?;
                return Err(Problem(format!(
                    "the container on port {} {}",
                    self.port, watched.text
                )));
            }
            self.events
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(watched);
            self.status.send_modify(|status| {
                status.ready = false;
                status.restarts = restarts;
            });
        }
    }

    /// Runs the preStop hook, and then sends SIGTERM, and SIGKILL at the end of the grace period.
    async fn stop(
        &self,
        container: &mut Instance,
        begun: Instant,
    ) -> Result<(Instant, Option<bool>, Ended), Problem> {
        let spec = &self.spec;
        let hook = async {
            match spec.pre_stop {
                Hook::None => None,
                Hook::Sleep(time) => {
                    sleep(time).await;
                    Some(true)
                }
                Hook::HttpGet(get) => {
                    let port = get.port.unwrap_or(self.port);
                    // The kubelet ignores the status.
                    let answer = if get.is_forwarded {
                        single::forwarded(port, get.path, spec.grace_period).await
                    } else {
                        single::once(port, "GET", get.path, spec.grace_period).await
                    };
                    Some(answer.is_ok())
                }
            }
        };
        let hook = tokio::time::timeout(spec.grace_period, hook).await;
        let hook = hook.unwrap_or(Some(false));
        let terminated = container.terminate();
        let grace_period = spec.grace_period.max(begun.elapsed() + spec.extension);
        let ended = container.ended(begun, grace_period).await?;
        Ok((terminated, hook, ended))
    }

    /// Probes the container until it must be started again. The startup probe comes first.
    /// Returns the probe that has failed.
    async fn watch(&self, lively: &Mutex<Lively>) -> &'static str {
        if !self.starts().await {
            return "startup";
        }
        tokio::select! {
            () = self.watch_liveness(lively, false) => "liveness",
            never = self.watch_readiness() => match never {},
        }
    }

    async fn watch_to_the_end(&self, lively: &Mutex<Lively>) -> std::convert::Infallible {
        tokio::join!(self.watch_readiness(), self.watch_liveness(lively, true)).0
    }

    /// Whether the startup probe succeeds.
    async fn starts(&self) -> bool {
        let probe = &self.spec.startup;
        let (mut ticks, mut row) = (probe.ticks(), InARow::default());
        loop {
            ticks.tick().await;
            if let Some(success) = row.add(probe, probe.ask(self.port).await.is_some()) {
                return success;
            }
        }
    }

    /// Returns when the liveness probe has failed, unless `goes_on`.
    async fn watch_liveness(&self, lively: &Mutex<Lively>, goes_on: bool) {
        let probe = &self.spec.liveness;
        let (mut ticks, mut row) = (probe.ticks(), InARow::default());
        let seen = || lively.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            ticks.tick().await;
            seen().asked();
            let answer = probe.ask(self.port).await;
            seen().add(answer.as_deref());
            if row.add(probe, answer.is_some()) == Some(false) && !goes_on {
                return;
            }
        }
    }

    async fn watch_readiness(&self) -> std::convert::Infallible {
        let probe = &self.spec.readiness;
        let (mut ticks, mut row) = (probe.ticks(), InARow::default());
        loop {
            ticks.tick().await;
            let success = probe.ask(self.port).await.is_some();
            if let Some(ready) = row.add(probe, success) {
                self.status.send_if_modified(|status| {
                    let changes = status.ready != ready;
                    status.ready = ready;
                    status.was_ready |= ready;
                    changes
                });
            }
        }
    }
}
