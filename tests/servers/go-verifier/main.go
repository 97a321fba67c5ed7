// What Go's crypto/x509, and with it every client and server in Go, makes of a chain: go-verifier CHAIN ROOTS, both PEM.
package main

import (
	"crypto/x509"
	"encoding/pem"
	"log"
	"os"
)

func main() {
	chain, roots := read(os.Args[1]), x509.NewCertPool()
	for _, root := range read(os.Args[2]) {
		roots.AddCert(root)
	}
	between := x509.NewCertPool()
	for _, certificate := range chain[1:] {
		between.AddCert(certificate)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		options := x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}}
		if _, err := chain[0].Verify(options); err != nil {
			log.Fatal(err)
		}
	}
}

func read(path string) (all []*x509.Certificate) {
	rest, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	for block, rest := pem.Decode(rest); block != nil; block, rest = pem.Decode(rest) {
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			log.Fatal(err)
		}
		all = append(all, certificate)
	}
	return all
}
