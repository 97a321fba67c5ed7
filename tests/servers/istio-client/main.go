// What Istio's agent does for its certificates, by Istio's own packages, unmodified: a secret manager that asks
// an authority with Istio's client, writes what it gets, and renews it. Runs until it is told to end.
package main

import (
	"flag"
	"fmt"
	"log"
	"time"

	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/credentialfetcher/plugin"
	"istio.io/istio/security/pkg/nodeagent/cache"
	citadel "istio.io/istio/security/pkg/nodeagent/caclient/providers/citadel"
)

func main() {
	// What the agent takes from its environment; defaults are the agent's, but for the kind of key.
	options := &security.Options{
		ECCSigAlg:                            "ECDSA",
		ECCCurve:                             "P256",
		WorkloadRSAKeySize:                   2048,
		SecretTTL:                            24 * time.Hour,
		SecretRotationGracePeriodRatio:       0.5,
		SecretRotationGracePeriodRatioJitter: 0.01,
		ClusterID:                            "Kubernetes",
		CAProviderName:                       "Citadel",
	}
	tls := &citadel.TLSOptions{}
	flag.StringVar(&options.CAEndpoint, "ca", "", "CA_ADDR")
	flag.StringVar(&options.TrustDomain, "trust-domain", "", "TRUST_DOMAIN")
	flag.StringVar(&options.WorkloadNamespace, "namespace", "", "POD_NAMESPACE")
	flag.StringVar(&options.ServiceAccount, "account", "", "SERVICE_ACCOUNT")
	flag.StringVar(&options.OutputKeyCertToDir, "output", "", "OUTPUT_CERTS")
	flag.StringVar(&options.ProvCert, "provisioned", "", "PROV_CERT")
	flag.StringVar(&options.ECCSigAlg, "ecc", options.ECCSigAlg, "ECC_SIGNATURE_ALGORITHM")
	flag.StringVar(&tls.RootCert, "root", "", "CA_ROOT_CA")
	token := flag.String("token", "", "what a kubelet mounts as istio-token")
	flag.Parse()
	options.CredFetcher = plugin.CreateTokenPlugin(*token)
	if options.ProvCert != "" {
		tls.Cert, tls.Key = options.ProvCert+"/cert-chain.pem", options.ProvCert+"/key.pem"
	}
	if err := serve(options, tls); err != nil {
		log.Fatal(err)
	}
}

func serve(options *security.Options, tls *citadel.TLSOptions) error {
	client, err := citadel.NewCitadelClient(options, tls)
	if err != nil {
		return err
	}
	manager, err := cache.NewSecretManagerClient(client, options)
	if err != nil {
		return err
	}
	defer manager.Close()
	// As its secret discovery does for a proxy that asked for both.
	renew := make(chan string, 16)
	manager.RegisterSecretHandler(func(name string) { renew <- name })
	renew <- security.WorkloadKeyCertResourceName
	for name := range renew {
		secret, err := manager.GenerateSecret(name)
		if err != nil {
			return err
		}
		fmt.Println("got", name, secret.ExpireTime.UTC().Format(time.RFC3339))
	}
	return nil
}
