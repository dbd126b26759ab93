//! New requests in the lame-duck phase, where a rule for leaving early wants to know of them.

use http::Request;

use super::refusal;
use crate::{handle::graceful::Admission, phase::Phase};

/// Notes a request that a balancer has sent to this service, although it is stopping: let in, or
/// refused above the limit. Probes and exempt paths are none.
pub(super) fn note<B>(admission: Admission, request: &Request<B>) {
    if !admission.rules().leave_early.is_on()
        || admission.phase() != Phase::LameDuck
        || refusal::is_exempt(admission, request)
    {
        return;
    }
    if let Some(shared) = admission.gate() {
        if shared.evidence.request_arrived() {
            shared.notify();
        }
    }
}
