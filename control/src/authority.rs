//! Who becomes a member, and who stays one: enrolment, renewal, and the tokens for them. What the API's routes call and
//! what `meshctl dev` calls in process.

mod ssh;

use std::{sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use proto::{
    api::{
        ADMIN_GROUP, ApiCode, ApiError, EnrolRequest, Enrolled, RenewFor, TokenCreated, TokenKind, TokenRequest,
        TokenView,
    },
    id::EdgeId,
    identity::{Identity, Role},
    join::JoinLine,
    secret::Secret,
    target::HostPort,
};
use runtime::{cert::CertFacts, clock::unix_now, identity::to_pem, tls::TrustBundle};
use rustls_pki_types::CertificateDer;

use crate::{
    ca::{Ca, CaError, Holder, HostName, Leaf, csr::Csr, roots, ssh::SshCa},
    config::LeafTtl,
    kube::review::{Reviewer, is_account_token},
    metrics::Metrics,
    store::{
        Store, StoreError,
        certificates::RenewError,
        tokens::{EnrolError, Enrolment},
    },
    token::{self, StoredToken},
    watch::Hub,
};

/// How long after its end a certificate may still be renewed through a shard: what clocks may differ by.
pub const RENEW_TOLERANCE: Duration = Duration::from_secs(600);
/// Longest life of a token: a year.
const MAX_TOKEN_TTL: u32 = 366 * 86_400;
/// Most uses of one token.
const MAX_USES: u32 = 1_000_000;
/// Most groups of one user.
const MAX_GROUPS: usize = 32;
/// Life of the first administrator's token: an hour.
const ADMIN_TOKEN_TTL: u32 = 3600;

/// Issues certificates and tokens by the rules. Clones share it.
#[derive(Clone, Debug)]
pub struct Authority(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ca: Ca,
    bundle: TrustBundle,
    store: Store,
    hub: Hub,
    metrics: Metrics,
    ttl: LeafTtl,
    /// Names that belong to control.
    reserved: Vec<HostName>,
    /// Where others reach control.
    public: HostPort,
    /// Knows service accounts of a cluster.
    reviewer: Option<Reviewer>,
    ssh: SshParts,
}

/// What SSH certificates are signed with.
#[derive(Debug)]
pub struct SshParts {
    /// The keys, if there are any.
    pub ca: Option<SshCa>,
    /// Longest life of a user's certificate.
    pub user_ttl: Duration,
}

/// What an [`Authority`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// The CA.
    pub ca: Ca,
    /// The roots that are trusted.
    pub bundle: TrustBundle,
    /// The database.
    pub store: Store,
    /// What is in force.
    pub hub: Hub,
    /// What is counted.
    pub metrics: Metrics,
    /// Life of certificates.
    pub ttl: LeafTtl,
    /// Names that only control may have.
    pub reserved: Vec<HostName>,
    /// Where others reach control, for join lines.
    pub public: HostPort,
    /// Knows service accounts of a cluster whose pods may enrol as shards.
    pub reviewer: Option<Reviewer>,
    /// For SSH.
    pub ssh: SshParts,
}

/// What the database's failure looks like from outside; its cause is for the log and for `/readyz`.
pub fn store_error(error: &StoreError) -> ApiError {
    match error {
        StoreError::Busy => ApiError::new(ApiCode::Busy, "control has too many changes to make; try again in a moment"),
        StoreError::Damaged { .. } | StoreError::Url(_) | StoreError::Migration(_) | StoreError::Foreign(_) => {
            tracing::error!(%error, "the database holds what it should not");
            ApiError::new(ApiCode::Internal, "control cannot read its own database; its log says why")
        }
        StoreError::Database(_) | StoreError::Deadline => ApiError::new(
            ApiCode::StoreUnavailable,
            "control's database cannot be used now, so nothing was changed; try again later (control's /readyz says why)",
        ),
    }
}

fn ca_error(error: &CaError) -> ApiError {
    tracing::error!(%error, "cannot issue");
    match error {
        CaError::Ended => ApiError::new(ApiCode::Internal, error.to_string()),
        CaError::File { .. } | CaError::Unusable(_) | CaError::Crypto(_) | CaError::Cert(_) => {
            ApiError::new(ApiCode::Internal, "control cannot issue certificates; its log says why")
        }
    }
}

fn bad(why: impl ToString) -> ApiError {
    ApiError::new(ApiCode::BadRequest, why.to_string())
}

const fn outcome(result: &Result<Enrolled, ApiError>) -> &'static str {
    match result {
        Ok(_) => "ok",
        Err(e) => code_name(e.code),
    }
}

/// The code as metrics and logs name it, which is how it stands in an [`ApiError`] too.
#[must_use]
pub const fn code_name(code: ApiCode) -> &'static str {
    match code {
        ApiCode::BadRequest => "bad-request",
        ApiCode::Unauthenticated => "unauthenticated",
        ApiCode::Forbidden => "forbidden",
        ApiCode::NotFound => "not-found",
        ApiCode::NameTaken => "name-taken",
        ApiCode::TokenUnknown => "token-unknown",
        ApiCode::TokenExpired => "token-expired",
        ApiCode::TokenUsed => "token-used",
        ApiCode::TokenMismatch => "token-mismatch",
        ApiCode::Revoked => "revoked",
        ApiCode::BadProof => "bad-proof",
        ApiCode::Busy => "busy",
        ApiCode::StoreUnavailable => "store-unavailable",
        ApiCode::Internal => "internal",
    }
}

impl Authority {
    /// Puts it together.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let Parts { ca, bundle, store, hub, metrics, ttl, reserved, public, reviewer, ssh } = parts;
        Self(Arc::new(Inner { ca, bundle, store, hub, metrics, ttl, reserved, public, reviewer, ssh }))
    }

    /// The CA.
    #[must_use]
    pub fn ca(&self) -> &Ca {
        &self.0.ca
    }

    /// The roots that are trusted, PEM.
    #[must_use]
    pub fn bundle_pem(&self) -> String {
        self.0.bundle.to_pem()
    }

    /// Enrols whoever holds a token. `from` is the address, for the audit log.
    ///
    /// # Errors
    /// If the request, the token, the name or the database does not allow it.
    pub async fn enrol(&self, request: &EnrolRequest, from: &str) -> Result<Enrolled, ApiError> {
        let (result, role) = self.try_enrol(request, from).await;
        let role = role.map_or("unknown", Role::as_str);
        self.0.metrics.enrolments.with_label_values(&[role, outcome(&result)]).inc();
        if let Err(error) = &result {
            let id = token::id_of(&request.token).unwrap_or("none");
            tracing::info!(target: "audit", from, token = id, name = request.name.as_ref().map(tracing::field::display), code = code_name(error.code), "enrolment refused");
        }
        result
    }

    async fn try_enrol(&self, request: &EnrolRequest, from: &str) -> (Result<Enrolled, ApiError>, Option<Role>) {
        let csr = match Csr::from_pem(&request.csr) {
            Ok(csr) => csr,
            Err(e) => return (Err(bad(e)), None),
        };
        let now = unix_now();
        if let Some(reviewer) = self.0.reviewer.as_ref().filter(|_| is_account_token(&request.token)) {
            return (self.enrol_pod(reviewer, request, csr, from).await, Some(Role::Shard));
        }
        match self.0.store.begin_enrolment(&request.token, request.name.as_ref(), now).await {
            Ok(enrolment) => {
                let role = enrolment.role();
                (self.finish_enrolment(enrolment, csr, from, now).await, Some(role))
            }
            Err(error) => {
                if let EnrolError::Refused(refusal) = &error {
                    self.0.metrics.token_refusals.with_label_values(&[code_name(refusal.code())]).inc();
                }
                (Err(enrol_error(&error)), None)
            }
        }
    }

    /// Enrols a shard by the token of its pod's service account.
    async fn enrol_pod(
        &self,
        reviewer: &Reviewer,
        request: &EnrolRequest,
        csr: Csr,
        from: &str,
    ) -> Result<Enrolled, ApiError> {
        let (shard, account) = reviewer.shard(&request.token, request.name.as_ref()).await.inspect_err(|refused| {
            self.0.metrics.token_refusals.with_label_values(&[code_name(refused.code)]).inc();
        })?;
        let name: EdgeId = shard.as_str().parse().map_err(bad)?;
        let identity = Identity::new(self.0.ca.domain().clone(), Role::Shard, name.clone());
        let holder = Holder { identity, groups: vec![], site: None, hosts: vec![] };
        let now = unix_now();
        let (leaf, holder) = self.issue(holder, csr, now)?;
        let revision = self.0.store.enrolled(&name, &leaf, now).await.map_err(|e| store_error(&e))?;
        self.issued(&leaf);
        tracing::info!(target: "audit", from, who = %holder.identity, %account, serial = leaf.serial, "enrolled");
        self.0.hub.in_force(revision).await;
        Ok(self.enrolled(&holder, &leaf))
    }

    async fn finish_enrolment(
        &self,
        enrolment: Enrolment,
        csr: Csr,
        from: &str,
        now: i64,
    ) -> Result<Enrolled, ApiError> {
        let (role, name, token) = (enrolment.role(), enrolment.name().clone(), enrolment.token().clone());
        let identity = Identity::new(self.0.ca.domain().clone(), role, name);
        let holder = Holder { identity, groups: token.groups, site: token.site, hosts: vec![] };
        let replaced = enrolment.replaces();
        let (leaf, holder) = self.issue(holder, csr, now)?;
        let revision = enrolment.finish(&leaf, now).await.map_err(|e| enrol_error(&e))?;
        self.issued(&leaf);
        tracing::info!(target: "audit", from, who = %holder.identity, token = token.id, serial = leaf.serial, replaced, "enrolled");
        if replaced {
            self.0.metrics.revocations.with_label_values(&[role.as_str()]).inc();
        }
        self.0.hub.in_force(revision).await;
        Ok(self.enrolled(&holder, &leaf))
    }

    /// Renews the certificate that the caller showed by mutual TLS.
    ///
    /// # Errors
    /// If the request or the database does not allow it.
    pub async fn renew(&self, facts: &CertFacts, csr: &str) -> Result<Enrolled, ApiError> {
        let result = match Csr::from_pem(csr) {
            Ok(csr) => self.renew_verified(facts, csr, "itself").await,
            Err(e) => Err(bad(e)),
        };
        self.count_renewal(facts.identity.role, &result);
        result
    }

    /// Renews an edge's certificate that a shard passed on, if the proof holds.
    ///
    /// # Errors
    /// If the proof does not hold, or the request or the database does not allow it.
    pub async fn renew_for(&self, shard: &Identity, request: &RenewFor) -> Result<Enrolled, ApiError> {
        let result = self.try_renew_for(shard, request).await;
        self.count_renewal(Role::Edge, &result);
        if let Err(error) = &result {
            tracing::info!(target: "audit", who = %shard, code = code_name(error.code), %error, "renewal for an edge refused");
        }
        result
    }

    async fn try_renew_for(&self, shard: &Identity, request: &RenewFor) -> Result<Enrolled, ApiError> {
        let decode = |what: &str, text: &str| {
            BASE64_STANDARD.decode(text).map_err(|e| bad(format!("{what} is not base64: {e}")))
        };
        let csr = decode("csr", &request.csr)?;
        let signature = decode("signature", &request.signature)?;
        let leaf = CertificateDer::from(decode("certificate", &request.certificate)?);
        let proof = |why: String| ApiError::new(ApiCode::BadProof, why);
        let facts = CertFacts::from_der(&leaf).map_err(|e| proof(e.to_string()))?;
        let now = unix_now();
        let tolerance = i64::try_from(RENEW_TOLERANCE.as_secs()).unwrap_or(0);
        if facts.not_after.saturating_add(tolerance) < now {
            return Err(proof(format!(
                "the certificate of {} ended {} s ago; it must be enrolled again, with a new token",
                facts.identity,
                now - facts.not_after
            )));
        }
        let at = now.min(facts.not_after);
        roots::check_proof(&self.0.bundle, &leaf, &csr, &signature, at).map_err(|e| proof(e.to_string()))?;
        if facts.identity.role != Role::Edge || facts.identity.domain != *self.0.ca.domain() {
            return Err(proof(format!("{} is not an edge of this mesh; others renew by themselves", facts.identity)));
        }
        let csr = Csr::from_der(&csr).map_err(bad)?;
        self.renew_verified(&facts, csr, shard.name.as_str()).await
    }

    async fn renew_verified(&self, facts: &CertFacts, csr: Csr, by: &str) -> Result<Enrolled, ApiError> {
        let now = unix_now();
        let renewal = self.0.store.begin_renewal(facts).await.map_err(|e| renew_error(&e))?;
        let holder = Holder {
            identity: facts.identity.clone(),
            groups: facts.groups.clone(),
            site: facts.site.clone(),
            hosts: vec![],
        };
        let (leaf, holder) = self.issue(holder, csr, now)?;
        let revision = renewal.finish(&leaf, now).await.map_err(|e| renew_error(&e))?;
        self.issued(&leaf);
        tracing::info!(target: "audit", who = %holder.identity, by, old = facts.serial, serial = leaf.serial, "renewed");
        self.0.hub.in_force(revision).await;
        Ok(self.enrolled(&holder, &leaf))
    }

    /// Issues for a holder; a shard gets the host names that it asks for, unless one is control's.
    fn issue(&self, mut holder: Holder, csr: Csr, now: i64) -> Result<(Leaf, Holder), ApiError> {
        let role = holder.identity.role;
        let key = csr.key().clone();
        if role == Role::Shard {
            if let Some(name) = csr.hosts().iter().find(|h| self.0.reserved.contains(h) && !h.is_loopback()) {
                return Err(bad(format!(
                    "{name} is a name of control itself, so no shard gets a certificate for it; take it out of the \
                     shard's names"
                )));
            }
            holder.hosts = csr.into_hosts();
        }
        let leaf = self.0.ca.issue(&holder, &key, self.0.ttl.of(role), now).map_err(|e| ca_error(&e))?;
        Ok((leaf, holder))
    }

    fn issued(&self, leaf: &Leaf) {
        self.0.metrics.issued.with_label_values(&[leaf.role.as_str()]).inc();
    }

    fn count_renewal(&self, role: Role, result: &Result<Enrolled, ApiError>) {
        self.0.metrics.renewals.with_label_values(&[role.as_str(), outcome(result)]).inc();
    }

    fn enrolled(&self, holder: &Holder, leaf: &Leaf) -> Enrolled {
        Enrolled {
            identity: holder.identity.to_string(),
            chain: to_pem("CERTIFICATE", &leaf.der),
            bundle: self.0.bundle.to_pem(),
            not_after: leaf.not_after,
            shards: self.0.hub.state().shards(),
        }
    }

    /// Makes a token. `by` is who asks, for the records.
    ///
    /// # Errors
    /// If the request makes no sense, or the database cannot be written.
    pub async fn create_token(&self, request: &TokenRequest, by: &str) -> Result<TokenCreated, ApiError> {
        check(request)?;
        let now = unix_now();
        let (id, text) = token::generate(&rand::random());
        let stored = StoredToken {
            id,
            sha256: token::sha256_hex(&text),
            kind: request.kind,
            name: request.name.clone(),
            uses_left: (request.kind != TokenKind::Access).then_some(request.uses),
            expires: now.saturating_add(i64::from(request.ttl_secs)),
            groups: request.groups.clone(),
            site: request.site.clone(),
            replace: request.replace,
            created_by: by.to_owned(),
            created: now,
        };
        let revision = self.0.store.create_token(&stored).await.map_err(|e| store_error(&e))?;
        tracing::info!(target: "audit", who = by, token = stored.id, kind = %stored.kind, name = stored.name.as_ref().map(tracing::field::display), uses = stored.uses_left, expires = stored.expires, "token created");
        self.0.hub.in_force(revision).await;
        let join = (request.kind != TokenKind::Access).then(|| JoinLine {
            control: self.0.public.clone(),
            ca: self.0.ca.hash(),
            token: text.clone(),
            name: request.name.clone(),
        });
        let join = join.map(|line| Secret::new(line.reveal()));
        Ok(TokenCreated { view: view(stored), token: text, join })
    }

    /// Makes the token that the first administrator enrols with: user `admin`, group `admin`, one use, one hour.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn admin_token(&self) -> Result<TokenCreated, ApiError> {
        let name = |e: proto::id::InvalidName| ApiError::new(ApiCode::Internal, e.to_string());
        let request = TokenRequest {
            kind: TokenKind::User,
            name: Some("admin".parse().map_err(name)?),
            uses: 1,
            ttl_secs: ADMIN_TOKEN_TTL,
            groups: vec![ADMIN_GROUP.parse().map_err(name)?],
            site: None,
            replace: false,
        };
        self.create_token(&request, "control").await
    }
}

/// What is shown of a token.
#[must_use]
pub fn view(token: StoredToken) -> TokenView {
    TokenView {
        id: token.id,
        kind: token.kind,
        name: token.name,
        uses_left: token.uses_left,
        expires: token.expires,
        groups: token.groups,
        site: token.site,
        created_by: token.created_by,
        created: token.created,
    }
}

fn check(request: &TokenRequest) -> Result<(), ApiError> {
    let TokenRequest { kind, name, uses, ttl_secs, groups, site, replace } = request;
    let for_user = matches!(kind, TokenKind::User | TokenKind::Access);
    let complaint = if for_user && name.is_none() {
        Some(format!("a token of kind {kind} needs the user's name"))
    } else if !for_user && !groups.is_empty() {
        Some(format!("groups are for users, not for a token of kind {kind}"))
    } else if groups.len() > MAX_GROUPS {
        Some(format!("{} groups are too many; at most {MAX_GROUPS} are allowed", groups.len()))
    } else if *kind != TokenKind::Edge && (site.is_some() || *replace) {
        Some(format!("site and replace are for edges, not for a token of kind {kind}"))
    } else if *kind != TokenKind::Access && !(1..=MAX_USES).contains(uses) {
        Some(format!("uses must be from 1 to {MAX_USES}, not {uses}"))
    } else if !(1..=MAX_TOKEN_TTL).contains(ttl_secs) {
        Some(format!("ttl_secs must be from 1 to {MAX_TOKEN_TTL} (a year), not {ttl_secs}"))
    } else {
        None
    };
    complaint.map_or(Ok(()), |why| Err(bad(why)))
}

fn enrol_error(error: &EnrolError) -> ApiError {
    match error {
        EnrolError::Refused(refusal) => ApiError::new(refusal.code(), refusal.to_string()),
        EnrolError::NameTaken(_) => ApiError::new(ApiCode::NameTaken, error.to_string()),
        EnrolError::Store(e) => store_error(e),
    }
}

fn renew_error(error: &RenewError) -> ApiError {
    match error {
        RenewError::Revoked(_) => ApiError::new(ApiCode::Revoked, error.to_string()),
        RenewError::Store(e) => store_error(e),
    }
}
