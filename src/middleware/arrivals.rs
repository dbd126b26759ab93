//! Records new requests in the lame-duck phase, if a rule for ending the phase early is set.

use http::Request;

use super::refusal;
use crate::{handle::graceful::Admission, phase::Phase};

/// Records a request that was sent to this service although the service is stopping. It was either
/// admitted, or rejected above the limit. Requests for probes and exempt paths are not recorded.
pub(super) fn note<B>(admission: Admission, request: &Request<B>) {
    if !admission.rules().leave_early.is_on()
        || admission.phase() != Phase::LameDuck
        || refusal::is_exempt(admission, request)
    {
        return;
    }
    if let Some(shared) = admission.owner() {
        if shared.evidence.request_arrived() {
            shared.notify();
        }
    }
}
