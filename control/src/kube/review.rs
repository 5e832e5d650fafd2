//! Shards that enrol as the pods that they are: kube-apiserver says whose a service account's token is.
//!
//! The token must be made for us (its audience), of an account that the configuration names, and bound to a pod, whose
//! name becomes the shard's. So a pod can enrol as itself and as nobody else, and as often as it starts.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, Client, api::PostParams};
use proto::{
    api::{ApiCode, ApiError},
    book::ObjectKey,
    id::{EdgeId, ShardId},
    secret::Secret,
};
use tokio::time::{Duration, timeout};

/// Longest time for kube-apiserver's answer.
const REVIEW: Duration = Duration::from_secs(10);
/// Longest token that is shown to kube-apiserver, in bytes.
const MAX_TOKEN: usize = 16 * 1024;
/// Where the review tells the pod's name.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
/// What names of accounts begin with.
const ACCOUNT: &str = "system:serviceaccount:";

/// Asks kube-apiserver about tokens.
#[derive(Clone)]
pub struct Reviewer {
    client: Client,
    rules: Rules,
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reviewer({:?})", self.rules)
    }
}

/// Whose token is good.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The audience that a token must be made for.
    pub audience: String,
    /// The accounts whose pods are shards.
    pub accounts: Vec<ObjectKey>,
}

/// Whether a text may be a service account's token; ours look otherwise.
#[must_use]
pub fn is_account_token(token: &Secret) -> bool {
    let text = token.reveal();
    text.starts_with("ey") && text.len() <= MAX_TOKEN && text.split('.').filter(|part| !part.is_empty()).count() == 3
}

impl Reviewer {
    /// One that asks there.
    #[must_use]
    pub const fn new(client: Client, rules: Rules) -> Self {
        Self { client, rules }
    }

    /// Finds out which shard the holder of a token is, and by which account.
    ///
    /// # Errors
    /// If it is none, or kube-apiserver cannot be asked.
    pub async fn shard(&self, token: &Secret, asked: Option<&EdgeId>) -> Result<(ShardId, ObjectKey), ApiError> {
        let spec = TokenReviewSpec {
            audiences: Some(vec![self.rules.audience.clone()]),
            token: Some(token.reveal().to_owned()),
        };
        let review = TokenReview { spec, ..TokenReview::default() };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let away = |why: String| {
            tracing::warn!(why, "kube-apiserver cannot be asked about a service account's token");
            let text = "kube-apiserver cannot be asked about this token now; try again later (control's log says why)";
            ApiError::new(ApiCode::StoreUnavailable, text)
        };
        let reviewed = match timeout(REVIEW, reviews.create(&PostParams::default(), &review)).await {
            Ok(Ok(reviewed)) => reviewed,
            Ok(Err(error)) => return Err(away(error.to_string())),
            Err(_) => return Err(away(format!("no answer within {} s", REVIEW.as_secs()))),
        };
        self.rules.judge(reviewed.status.unwrap_or_default(), asked)
    }
}

impl Rules {
    /// What a review says about who that is.
    fn judge(&self, status: TokenReviewStatus, asked: Option<&EdgeId>) -> Result<(ShardId, ObjectKey), ApiError> {
        let no = |code, why: String| Err(ApiError::new(code, why));
        // Whoever does not know audiences has not checked ours.
        let ours = status.audiences.iter().flatten().any(|audience| *audience == self.audience);
        let Some(user) = status.user.filter(|_| status.authenticated == Some(true) && ours) else {
            let why = status.error.unwrap_or_else(|| "it has ended, or is made for somebody else".into());
            let audience = &self.audience;
            let text = format!("kube-apiserver does not take this token for the audience {audience:?}: {why}");
            return no(ApiCode::TokenUnknown, text);
        };
        let username = user.username.unwrap_or_default();
        let account = username.strip_prefix(ACCOUNT).and_then(|name| name.split_once(':'));
        let account = account.map(|(namespace, name)| ObjectKey::new(namespace, name));
        let Some(account) = account.filter(|account| self.accounts.contains(account)) else {
            let text = format!("{username} may not enrol shards; kubernetes.shard_accounts of control names who may");
            return no(ApiCode::TokenMismatch, text);
        };
        let pods = user.extra.and_then(|mut extra| extra.remove(POD_NAME)).unwrap_or_default();
        let [pod] = pods.as_slice() else {
            let text = "this token is not bound to a pod; mount it as a projected volume of the shard's pod";
            return no(ApiCode::TokenMismatch, text.into());
        };
        if let Some(asked) = asked.filter(|asked| asked.as_str() != pod) {
            let text = format!("this token is that of the pod {pod}, which cannot enrol as {asked}");
            return no(ApiCode::TokenMismatch, text);
        }
        match pod.parse() {
            Ok(shard) => Ok((shard, account)),
            Err(error) => no(ApiCode::BadRequest, format!("a pod's name becomes the shard's: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[allow(clippy::unwrap_in_result, reason = "what it reads is written below")]
    fn judge(status: Value, asked: Option<&str>) -> Result<String, ApiCode> {
        let rules = Rules { audience: "causeway".into(), accounts: vec![ObjectKey::new("mesh", "shard")] };
        let asked = asked.map(|name| name.parse().unwrap());
        let judged = rules.judge(serde_json::from_value(status).unwrap(), asked.as_ref());
        judged.map(|(shard, _)| shard.to_string()).map_err(|error| error.code)
    }

    fn status(account: &str, audiences: &[&str], pod: &[&str]) -> Value {
        let extra = json!({"authentication.kubernetes.io/pod-name": pod});
        json!({"authenticated": true, "audiences": audiences, "user": {"username": account, "extra": extra}})
    }

    #[test]
    fn a_pod_of_the_right_account_enrols_as_itself_and_as_nobody_else() {
        let good = status("system:serviceaccount:mesh:shard", &["causeway"], &["shard-7f9c-x2"]);
        assert_eq!(judge(good.clone(), None), Ok("shard-7f9c-x2".into()));
        assert_eq!(judge(good.clone(), Some("shard-7f9c-x2")), Ok("shard-7f9c-x2".into()));
        assert_eq!(judge(good, Some("shard-0")), Err(ApiCode::TokenMismatch));
        for account in ["system:serviceaccount:mesh:default", "system:serviceaccount:other:shard", "alice", ""] {
            assert_eq!(judge(status(account, &["causeway"], &["p"]), None), Err(ApiCode::TokenMismatch), "{account}");
        }
        let unbound = status("system:serviceaccount:mesh:shard", &["causeway"], &[]);
        assert_eq!(judge(unbound, Some("p")), Err(ApiCode::TokenMismatch));
    }

    #[test]
    fn a_token_for_somebody_else_or_an_ended_one_is_none() {
        let shard = "system:serviceaccount:mesh:shard";
        assert_eq!(judge(status(shard, &["https://kubernetes.default.svc"], &["p"]), None), Err(ApiCode::TokenUnknown));
        assert_eq!(judge(status(shard, &[], &["p"]), None), Err(ApiCode::TokenUnknown), "who knows no audiences");
        assert_eq!(judge(json!({"error": "token has expired"}), None), Err(ApiCode::TokenUnknown));
        assert_eq!(judge(json!({"authenticated": false}), None), Err(ApiCode::TokenUnknown));
    }

    #[test]
    fn tokens_of_ours_and_of_accounts_are_told_apart() {
        let token = |text: &str| is_account_token(&Secret::new(text.to_owned()));
        assert!(token("eyJhbGciOiJSUzI1NiJ9.eyJhdWQiOlsiY2F1c2V3YXkiXX0.c2ln"));
        assert!(!token("cw_abcdefgh.abcdefghijkmnpqrstuvwxyz234567"));
        assert!(!token("eyJhbGciOiJSUzI1NiJ9..c2ln"));
        assert!(!token(&format!("ey{}.a.b", "x".repeat(MAX_TOKEN))));
    }
}
